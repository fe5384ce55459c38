"""What all benchmarks share: how they are called, how they take turns, and what they report.

``command`` has the command line and runs a benchmark from its options to its verdicts; ``rounds``
runs cases in turn and makes a record of a case's rounds; ``bars`` has the figures to reach;
``tables`` and ``results`` print, write and plot; ``processes`` starts cases in processes of their
own.
"""
