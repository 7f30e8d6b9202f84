//! Bodies of requests, within limits of size, time and memory.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::{Body, BodyDataStream, Bytes, HttpBody};
use futures_util::StreamExt;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::error::ApiError;
use crate::options::Limits;

/// A body up to so many bytes is read whoever sends it; a larger one must find room, and come at [`LARGE_RATE`].
const SMALL_BYTES: usize = 1 << 20;
/// Fewest bytes a second of a large body.
const LARGE_RATE: usize = 16 << 10;
/// How long a large body may pause.
const PATIENCE: Duration = Duration::from_secs(10);
/// The unit in which room is given.
const UNIT_BYTES: usize = 1 << 10;

/// Memory for the large bodies that are being received and prepared. What has come of a body takes room, not what was announced.
pub struct Room {
    units: Arc<Semaphore>,
    /// Held by one body that may go on without room, so that bodies which all wait for each other end.
    beyond: Arc<Semaphore>,
}

impl Room {
    /// Room for so many bytes, and one body more.
    pub fn new(bytes: usize) -> Room {
        Room { units: Arc::new(Semaphore::new(bytes / UNIT_BYTES)), beyond: Arc::new(Semaphore::new(1)) }
    }
}

/// What a body holds of the room.
#[derive(Default)]
pub struct Share {
    units: Option<OwnedSemaphorePermit>,
    beyond: Option<OwnedSemaphorePermit>,
}

impl Share {
    /// Waits for room for `bytes` bytes in all.
    async fn grow(&mut self, room: &Room, bytes: usize) {
        let held = self.units.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
        let missing = bytes.div_ceil(UNIT_BYTES).saturating_sub(held);
        if missing == 0 || self.beyond.is_some() {
            return;
        }
        let missing = u32::try_from(missing).unwrap_or(u32::MAX);
        // Nobody closes the semaphores.
        tokio::select! {
            biased;
            Ok(more) = room.units.clone().acquire_many_owned(missing) => match &mut self.units {
                Some(units) => units.merge(more),
                none => *none = Some(more),
            },
            Ok(beyond) = room.beyond.clone().acquire_owned() => self.beyond = Some(beyond),
            else => {}
        }
    }
}

/// How long a sender may still take. Time in which the server waits for room does not count.
struct Pace {
    limit_s: u64,
    left: Duration,
    patience: Duration,
}

impl Pace {
    fn new(limit_s: u64) -> Pace {
        Pace { limit_s, left: Duration::from_secs(limit_s), patience: PATIENCE }
    }

    /// The next part of the body, if there is one.
    async fn next(&mut self, parts: &mut BodyDataStream, is_large: bool) -> Result<Option<Bytes>, ApiError> {
        let wait = if is_large { self.left.min(self.patience) } else { self.left };
        let begun = Instant::now();
        let Ok(part) = tokio::time::timeout(wait, parts.next()).await else {
            let message = if wait == self.left {
                format!("the body did not come within {} s, the limit", self.limit_s)
            } else {
                format!("the body came too slowly: a large one needs {LARGE_RATE} bytes a second")
            };
            return Err(ApiError::new(408, message));
        };
        let part = part.transpose().map_err(|error| ApiError::new(400, format!("the body broke off: {error}")))?;
        let took = begun.elapsed();
        self.left = self.left.saturating_sub(took);
        if is_large {
            let earned = Duration::from_secs_f64(part.as_ref().map_or(0, Bytes::len) as f64 / LARGE_RATE as f64);
            self.patience = (self.patience.saturating_sub(took) + earned).min(PATIENCE);
        }
        Ok(part)
    }
}

/// Receives a body, and its share of the room, which is to be held as long as the body is.
///
/// # Errors
/// [`ApiError`] if it is too large, too slow, or broken off.
pub async fn receive(room: &Room, limits: &Limits, body: Body) -> Result<(Bytes, Share), ApiError> {
    let too_large = || ApiError::new(413, format!("the body has more than {} bytes, the limit", limits.body_bytes));
    // A length that was announced is believed, so that nobody sends all of it to learn that it is too much.
    if body.size_hint().lower() > limits.body_bytes as u64 {
        return Err(too_large());
    }
    let (mut bytes, mut share, mut pace) = (Vec::new(), Share::default(), Pace::new(limits.body_s));
    let mut parts = body.into_data_stream();
    while let Some(part) = pace.next(&mut parts, bytes.len() > SMALL_BYTES).await? {
        let length = bytes.len() + part.len();
        if length > limits.body_bytes {
            return Err(too_large());
        }
        if length > SMALL_BYTES {
            share.grow(room, length).await;
        }
        bytes.extend_from_slice(&part);
    }
    Ok((Bytes::from(bytes), share))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_body_always_goes_on() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            let room = Room::new(10 * UNIT_BYTES);
            let (mut first, mut second, mut third) = (Share::default(), Share::default(), Share::default());
            first.grow(&room, 4 * UNIT_BYTES).await;
            first.grow(&room, 6 * UNIT_BYTES).await;
            assert_eq!(room.units.available_permits(), 4);
            second.grow(&room, 100 * UNIT_BYTES).await;
            assert!(second.beyond.is_some());
            let waits = tokio::time::timeout(Duration::from_millis(20), third.grow(&room, 5 * UNIT_BYTES)).await;
            waits.unwrap_err();
            drop(first);
            third.grow(&room, 5 * UNIT_BYTES).await;
            assert!(third.beyond.is_none());
            assert_eq!(room.units.available_permits(), 5);
        });
    }
}
