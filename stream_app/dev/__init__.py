"""A local Kafka, real clicks and a live view: for development only."""
