"""`make bench`: every measurement, one after the other."""

from benchmarks import backlog, golden, ranking, step, training

if __name__ == "__main__":
    golden.main()
    step.main()
    ranking.main()
    training.main()
    backlog.main()
