"""The command line: its commands in :mod:`fednorm.cli.app`, and one file for what each of them does."""
