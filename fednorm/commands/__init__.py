"""What each command does; ``fednorm.cli`` reads the options and calls these."""
