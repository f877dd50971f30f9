"""What images and sound need of the start: the network that reads them, and what reads files beside the text side."""
