"""Clicks in on Kafka, refreshed recommendations out."""
