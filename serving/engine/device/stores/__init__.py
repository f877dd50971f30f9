"""What lies in memory beside the programs: pages, states and adapters on their way between devices and host, weights at rest."""
