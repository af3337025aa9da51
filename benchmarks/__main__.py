"""`make bench`: every measurement, one after the other."""

from benchmarks import backlog, golden

if __name__ == "__main__":
    golden.main()
    backlog.main()
