"""A machine that looks for programs on which the readers are wrong.

A ``Program`` (``description``) is a plain value; a hypothesis strategy (``strategies``) draws them. ``network`` builds the same
network from the same description whenever asked, ``running`` runs it forward and backward, plainly or with a reader around the
backward, and ``checking`` compares what came of it with one ``torch.autograd.grad`` per task on an equal program.

``python -m tests.random_programs --programs 10000`` looks for more of them than the tests do.
"""
