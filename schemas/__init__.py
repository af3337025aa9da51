"""The contract with other teams: JSON Schemas of every message and the binary layout of the user state."""
