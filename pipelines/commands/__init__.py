"""The sub-commands of `droppos`: each is a job's function, its arguments the job's.

Jobs are imported when they are called: `droppos --help` should not wait for torch and Ray.
"""
