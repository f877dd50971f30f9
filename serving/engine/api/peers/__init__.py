"""What engines that exchange pages say to each other, and what is counted of it."""
