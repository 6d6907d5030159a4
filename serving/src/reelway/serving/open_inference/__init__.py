"""The ranker of a release behind the Open Inference Protocol (v2), as KServe and its clients speak it.

Read ``server`` for its life, ``model`` for what it answers with, ``rest`` and ``rpc`` for the two ways to ask, and
``client`` for how a release's graph asks. Its arithmetic is the graph's own (``serving.sessions``); nothing here knows
Ray or Kubernetes, nor the ``kserve`` package: importing that costs a process a hundred megabytes and its server answers
500 to a truncated tensor, so the protocol's messages are built here, and the package is the tests' client.
"""
