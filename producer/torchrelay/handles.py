"""What a submit returns: handles on jobs, batches and training runs, for threads and for asyncio."""

from torchrelay.batch_handles import AsyncBatch, Batch
from torchrelay.job_handles import AsyncJob, Job
from torchrelay.run_handles import AsyncRun, Run

__all__ = ["AsyncBatch", "AsyncJob", "AsyncRun", "Batch", "Job", "Run"]
