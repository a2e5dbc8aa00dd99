"""Other trainers' own preprocessing, run in child processes and put beside what inference shows.

`adapters/` has a module of at most 40 lines for each trainer. It is handed to a Python that has that trainer and
needs nothing of ours.
"""
