"""Looks at the jobs of a Ray cluster, follows them and stops them.

pointsman jobs list                              all jobs that the head remembers, the newest first
pointsman jobs attach learn-demo                 the output from its beginning until the job ends; Ctrl-C leaves it running
pointsman jobs logs learn-demo                   the output so far
pointsman jobs stop learn-demo                   ends it; submitted again, the run goes on
"""

from jobs.lazy import Lazy, lazy_group

COMMANDS = {
    "list": Lazy("jobs.submissions.commands:list_jobs", "List jobs with their status, the newest first."),
    "logs": Lazy("jobs.submissions.commands:logs", "Print a job's output so far."),
    "attach": Lazy("jobs.submissions.commands:attach", "Follow a job until it ends; Ctrl-C leaves it running."),
    "stop": Lazy("jobs.submissions.commands:stop", "Stop a job; what it has finished is kept."),
}

app = lazy_group(COMMANDS, "List, follow and stop jobs that were submitted to a Ray cluster.")
