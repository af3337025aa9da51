"""`make bench`: every measurement but the long ones, one by one.

Those are quality, killed_training, memory, poison, scale, rebalance, latency and latest; and gpu, which wants one.
"""

from benchmarks import backlog, cost, golden, ranking, recovery, step, training

if __name__ == "__main__":
    golden.main()
    step.main()
    ranking.main()
    training.main()
    cost.main()
    backlog.main()
    recovery.main()
