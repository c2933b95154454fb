"""What a submit returns: handles on jobs and batches, for threads and for asyncio."""

from torchrelay.batch_handles import AsyncBatch, Batch
from torchrelay.job_handles import AsyncJob, Job

__all__ = ["AsyncBatch", "AsyncJob", "Batch", "Job"]
