"""`baton bench`: a load generator for either door of a router, or for any OpenAI-like server.

A plan of requests (workload.py, trace.py, plan.py) is driven (drive.py) against a door (doors.py);
what each client saw (sample.py) becomes figures (figures.py), a table, JSON and a plot.
"""
