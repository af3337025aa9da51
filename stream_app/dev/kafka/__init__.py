"""A local single-node Apache Kafka: its jars, a Java to run it, the broker itself."""
