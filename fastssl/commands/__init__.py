"""What a user types: a file a command, which parses, checks at the door, and calls."""
