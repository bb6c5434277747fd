"""Which columns of a job are read where."""

from __future__ import annotations

from sqlalchemy.orm import defer

from app.db.orm import Job

# What sweeps and claims look at: without what a client may have made large.
LEAN = (defer(Job.spec, raiseload=True), defer(Job.stages, raiseload=True))
