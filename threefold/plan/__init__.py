"""Plan: what a run will take, and what is worth running, before it is paid for. All estimates live here.

    scaling    width, depth, context and batch from the data and the compute at hand
"""
