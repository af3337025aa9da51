"""`stream-app demo`: real clicks replayed to the real worker, and a view of what happens."""
