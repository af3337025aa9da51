"""`make bench`: every measurement, one after the other."""

from benchmarks import backlog, golden, memory, poison, recovery, step, training

if __name__ == "__main__":
    golden.main()
    step.main()
    training.main()
    backlog.main()
    recovery.main()
    poison.main()
    memory.main()
