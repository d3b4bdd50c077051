"""The recipes, a file a method, and how one is found by name and changed."""
