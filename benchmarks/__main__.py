"""`make bench`: every measurement, one after the other."""

from benchmarks import backlog, golden, training

if __name__ == "__main__":
    golden.main()
    training.main()
    backlog.main()
