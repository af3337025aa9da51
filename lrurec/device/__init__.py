"""The engine on a torch device: one copy there and one back for a micro-batch, and no more operators than it needs."""
