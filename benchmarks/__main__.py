"""`make bench`: every measurement, one after the other."""

from benchmarks import backlog

if __name__ == "__main__":
    backlog.main()
