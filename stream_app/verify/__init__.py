"""`stream-app verify`: what the topics hold, against what the clicks alone say they must hold.

An oracle: it reads topics as any foreign client would and shares no code with the worker, neither its decoder nor its
kernels nor its layout of states. From the worker's settings it takes names and limits alone.
"""
