//! A transport that sends no faster than the operator allows.
//!
//! A bucket of bytes fills at the rate and holds one tick's worth; what is in it may be sent at once. Receiving is the other
//! side's business.

use std::io::{Error, ErrorKind, IoSlice, Result};
use std::time::{Duration, Instant};

use crate::migration::transport::{TICK_MS, Transport};
use crate::sys::Mapping;

pub(super) struct Throttled {
    inner: Box<dyn Transport>,
    bytes_per_second: u64,
    bucket: Bucket,
    started: Instant,
}

impl Throttled {
    pub(super) fn new(inner: Box<dyn Transport>, bytes_per_second: u64) -> Self {
        Self { inner, bytes_per_second, bucket: Bucket::default(), started: Instant::now() }
    }
}

/// Pure: time comes in as microseconds since the start.
#[derive(Debug, Default)]
struct Bucket {
    bytes: u64,
    filled_us: u64,
}

impl Bucket {
    fn fill(&mut self, now_us: u64, bytes_per_second: u64) {
        let earned = |us: u64| u128::from(us) * u128::from(bytes_per_second) / 1_000_000;
        let most = earned(TICK_MS * 1000).max(1);
        let more = earned(now_us.saturating_sub(self.filled_us));
        // Time that has not earned a whole byte yet is not forgotten.
        if more > 0 {
            self.filled_us = now_us;
            self.bytes = u64::try_from((u128::from(self.bytes) + more).min(most)).unwrap_or(u64::MAX);
        }
    }
}

/// The first `limit` bytes of `parts`.
fn cut<'a>(parts: &'a [IoSlice<'_>], limit: u64) -> Vec<IoSlice<'a>> {
    let mut left = usize::try_from(limit).unwrap_or(usize::MAX);
    let mut cut = Vec::with_capacity(parts.len());
    for part in parts {
        let taken = part.len().min(left);
        cut.push(IoSlice::new(&part[..taken]));
        left -= taken;
    }
    cut
}

impl Transport for Throttled {
    fn send(&mut self, parts: &[IoSlice<'_>]) -> Result<usize> {
        let now_us = u64::try_from(self.started.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.bucket.fill(now_us, self.bytes_per_second);
        if self.bucket.bytes == 0 {
            std::thread::sleep(Duration::from_millis(TICK_MS / 10));
            return Err(Error::from(ErrorKind::WouldBlock));
        }
        let sent = self.inner.send(&cut(parts, self.bucket.bytes))?;
        self.bucket.bytes = self.bucket.bytes.saturating_sub(sent as u64);
        Ok(sent)
    }

    fn receive(&mut self, buffer: &mut [u8]) -> Result<usize> {
        self.inner.receive(buffer)
    }

    fn receive_into(&mut self, memory: &Mapping, offset: u64, length: u64) -> Result<u64> {
        self.inner.receive_into(memory, offset, length)
    }

    fn peer(&self) -> String {
        self.inner.peer()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_second_carries_more_than_the_rate_and_a_tick() {
        for (rate, step_us) in [(1, 1000), (1000, 7), (65_536, 333), (1 << 30, 1), (1 << 30, 1_000_000)] {
            let mut bucket = Bucket::default();
            let (mut now, mut total) = (0, 0_u128);
            while now < 3_000_000 {
                now += step_us;
                bucket.fill(now, rate);
                total += u128::from(bucket.bytes);
                bucket.bytes = 0;
            }
            let most = u128::from(rate) * u128::from(now) / 1_000_000 + u128::from(rate) / 20 + 1;
            assert!(total <= most, "{rate} B/s every {step_us} us: {total} > {most}");
            if step_us <= TICK_MS * 1000 {
                assert!(total * 10 >= u128::from(rate) * 3 * 9, "{rate} B/s every {step_us} us: only {total} in 3 s");
            }
        }
    }

    #[test]
    fn idle_time_is_worth_one_tick_at_most() {
        let mut bucket = Bucket::default();
        bucket.fill(3_600_000_000, 1_000_000);
        assert_eq!(bucket.bytes, 50_000);
    }

    #[test]
    fn what_is_sent_is_cut_at_the_limit() {
        let parts = [IoSlice::new(b"abc"), IoSlice::new(b"defg")];
        for limit in 0..9 {
            let cut: Vec<u8> = cut(&parts, limit).iter().flat_map(|part| part.to_vec()).collect();
            assert_eq!(cut, &b"abcdefg"[..usize::try_from(limit.min(7)).unwrap()]);
        }
    }

    /// spec: CONTROL-48
    #[test]
    fn a_throttled_stream_takes_its_time_and_arrives_whole() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let sender = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut receiver, _) = listener.accept().unwrap();
        let inner = crate::migration::transport::TcpTransport::new(sender).unwrap();
        let mut throttled = Throttled::new(Box::new(inner), 1 << 20);
        let data: Vec<u8> = (0..200_000_u32).map(|i| i as u8).collect();
        let begin = Instant::now();
        let mut sent = 0;
        while sent < data.len() {
            match throttled.send(&[IoSlice::new(&data[sent..])]) {
                Ok(count) => sent += count,
                Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
            }
        }
        // 200,000 bytes at 1 MiB a second, less the first tick's worth.
        assert!(begin.elapsed() >= Duration::from_millis(140), "{:?}", begin.elapsed());
        drop(throttled);
        let mut arrived = Vec::new();
        std::io::Read::read_to_end(&mut receiver, &mut arrived).unwrap();
        assert_eq!(arrived, data);
    }
}
