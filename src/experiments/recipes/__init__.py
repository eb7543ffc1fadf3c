"""The parts of recipes in conf/experiment that are not among the framework's own: one file for each
job, as one would write it for a job of one's own.
"""
