"""Plan: what a run will take, and what is worth running, before it is paid for. All estimates live here.

    check      what can be refused before anything is read or written
    scaling    width, depth, context and batch from the data and the compute at hand
    shape      the plan of one run, as plain values for its log
"""
