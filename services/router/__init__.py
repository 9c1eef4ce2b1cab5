"""The router: admits, queues and places requests, and relays tokens as text."""
