//! How much a key may ask for: two accounts that fill up by themselves, of requests and of tokens.
//!
//! A request pays when it comes, its tokens when they have been counted: an account may come into debt by one request's tokens, and until it is out of it there
//! is no other. So nobody has to know beforehand how long an answer will be.

use super::error::ApiError;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// What may be asked for in a minute; `None` is no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Rates {
    pub requests_per_minute: Option<u32>,
    pub tokens_per_minute: Option<u32>,
}

/// The accounts of one key.
#[derive(Debug)]
pub(super) struct Meter {
    rates: Rates,
    accounts: Mutex<Accounts>,
}

#[derive(Debug)]
struct Accounts {
    requests: Account,
    tokens: Account,
}

impl Meter {
    pub fn new(rates: Rates) -> Self {
        let full = |per_minute: Option<u32>| per_minute.map_or(f64::INFINITY, f64::from);
        let now = Instant::now();
        let account = |per_minute| Account { most: full(per_minute), left: full(per_minute), at: now };
        let accounts =
            Accounts { requests: account(rates.requests_per_minute), tokens: account(rates.tokens_per_minute) };
        Self { rates, accounts: Mutex::new(accounts) }
    }

    pub fn rates(&self) -> Rates {
        self.rates
    }

    /// Takes one request of the account.
    ///
    /// # Errors
    /// There is none left, or the tokens of earlier ones are not paid off: 429, with the time until there is.
    pub fn request(&self) -> Result<(), ApiError> {
        self.request_at(Instant::now())
    }

    fn request_at(&self, now: Instant) -> Result<(), ApiError> {
        let mut accounts = self.accounts.lock().expect("nothing panics with it");
        let refused = |what: &str, per_minute: Option<u32>, wait: Duration| {
            let n = per_minute.unwrap_or_default();
            ApiError::rate_limited(format!("this key may have {n} {what} a minute: try again later"), wait)
        };
        let Accounts { requests, tokens } = &mut *accounts;
        tokens.wait(now, 0.0).map_or(Ok(()), |wait| Err(refused("tokens", self.rates.tokens_per_minute, wait)))?;
        requests
            .wait(now, 1.0)
            .map_or(Ok(()), |wait| Err(refused("requests", self.rates.requests_per_minute, wait)))?;
        requests.left -= 1.0;
        Ok(())
    }

    /// Pays for tokens that were read and written.
    pub fn tokens(&self, n: usize) {
        self.accounts.lock().expect("nothing panics with it").tokens.left -= n as f64;
    }
}

/// What is left of so many a minute.
#[derive(Debug)]
struct Account {
    most: f64,
    left: f64,
    at: Instant,
}

impl Account {
    /// How long it is until more than nothing is left, and at least `enough`; `None` where it is.
    fn wait(&mut self, now: Instant, enough: f64) -> Option<Duration> {
        if self.most.is_infinite() {
            return None;
        }
        let elapsed = now.saturating_duration_since(self.at).as_secs_f64();
        self.left = (self.left + elapsed * self.most / 60.0).min(self.most);
        self.at = now;
        let is_enough = if enough > 0.0 { self.left >= enough } else { self.left > 0.0 };
        (!is_enough).then(|| Duration::from_secs_f64(((enough - self.left) * 60.0 / self.most).clamp(0.0, 86_400.0)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(start: Instant, seconds: f64) -> Instant {
        start + Duration::from_secs_f64(seconds)
    }

    #[test]
    fn requests_come_back_with_time() {
        let meter = Meter::new(Rates { requests_per_minute: Some(6), tokens_per_minute: None });
        let start = Instant::now();
        for n in 0..6 {
            assert_eq!(meter.request_at(after(start, f64::from(n) * 0.01)), Ok(()));
        }
        let refused = meter.request_at(after(start, 1.0)).unwrap_err();
        assert_eq!((refused.status.as_u16(), refused.code), (429, Some("rate_limit_exceeded")));
        let wait = refused.retry_after.unwrap().as_secs_f64();
        assert!((8.9..=9.1).contains(&wait), "one comes in ten seconds, of which one is over: {wait}");
        assert!(meter.request_at(after(start, 10.1)).is_ok());
        assert!(meter.request_at(after(start, 10.2)).is_err());
        for n in 0..6 {
            assert!(
                meter.request_at(after(start, 1000.0 + f64::from(n))).is_ok(),
                "no more than a minute's are saved up"
            );
        }
        assert!(meter.request_at(after(start, 1005.1)).is_err());
    }

    #[test]
    fn tokens_are_paid_afterwards() {
        let meter = Meter::new(Rates { requests_per_minute: None, tokens_per_minute: Some(60) });
        let start = Instant::now();
        assert!(meter.request_at(start).is_ok());
        assert!(meter.request_at(start).is_ok(), "nothing is counted yet");
        meter.tokens(90);
        let refused = meter.request_at(start).unwrap_err();
        let wait = refused.retry_after.unwrap().as_secs_f64();
        assert!((29.0..=30.0).contains(&wait), "30 tokens of debt are half a minute: {wait}");
        assert!(meter.request_at(after(start, 29.0)).is_err());
        assert!(meter.request_at(after(start, 31.0)).is_ok());
    }

    #[test]
    fn without_limits_nothing_is_refused() {
        let meter = Meter::new(Rates::default());
        meter.tokens(usize::MAX);
        assert!((0..1000).all(|_| meter.request().is_ok()));
    }
}
