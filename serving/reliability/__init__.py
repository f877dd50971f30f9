"""What happens when things break: watchdog, crash reports, supervision, and faults on purpose."""
