"""Where the two wings meet: what is read from devices goes into repositories, and back.

Invariant: each verb is a plan that changes nothing, and an execution of that
very plan; neither prints.
"""
