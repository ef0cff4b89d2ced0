"""The server: routes, safety, events, start and end."""
