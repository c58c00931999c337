"""The `clustvit-ros` command."""
