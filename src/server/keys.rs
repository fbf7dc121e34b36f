use super::error::{ApiError, ServerError};
use super::rate::{Meter, Rates};
use crate::guard::Digest;
use axum::http::HeaderMap;
use axum::http::header::AUTHORIZATION;
use serde::Deserialize;
use std::path::Path;
use std::sync::Arc;
use subtle::ConstantTimeEq;

/// What a key may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Ask, and tighten guards for its own requests.
    User,
    /// Loosen them too, for its own requests.
    Trusted,
    /// Change guards for all.
    Admin,
}

/// `[[key]]` of a file of keys.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Key {
    /// What logs call it.
    pub name: String,
    /// Of the key's text, so that the file gives none away.
    pub sha256: Digest,
    pub role: Role,
    /// What all who bring it may ask for; no limit if not given.
    pub requests_per_minute: Option<u32>,
    /// Of prompts and answers together.
    pub tokens_per_minute: Option<u32>,
}

impl Key {
    fn rates(&self) -> Rates {
        Rates { requests_per_minute: self.requests_per_minute, tokens_per_minute: self.tokens_per_minute }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default, rename = "key")]
    keys: Vec<Key>,
}

/// Who may ask.
#[derive(Debug, Clone, Default)]
pub struct Keys {
    /// `None` asks for no key.
    keys: Option<Vec<(Key, Arc<Meter>)>>,
}

/// Whose request it is.
#[derive(Debug, Clone)]
pub(super) struct Caller {
    /// The key's name; none where none is asked for.
    pub name: Option<String>,
    pub role: Role,
    /// Of all who bring this key; nothing is counted where none is asked for.
    pub meter: Option<Arc<Meter>>,
    /// The trace that the request is a part of (W3C's `traceparent`).
    pub traceparent: Option<String>,
}

impl Keys {
    /// No key is asked for, and everybody is an admin.
    pub fn none() -> Self {
        Self::default()
    }

    /// Reads a file of keys:
    ///
    /// ```toml
    /// [[key]]
    /// name = "app"
    /// sha256 = "…"        # printf %s "$KEY" | sha256sum
    /// role = "user"       # or "trusted", "admin"
    /// requests_per_minute = 60    # no limit if not given
    /// tokens_per_minute = 20000   # prompts and answers
    /// ```
    ///
    /// # Errors
    /// It can't be read, is no such file, holds no key, holds two of one name, or a limit of 0.
    pub fn load(path: &Path) -> Result<Self, ServerError> {
        let problem = |problem: String| ServerError::Keys { path: path.to_owned(), problem };
        let text = std::fs::read_to_string(path).map_err(|error| problem(error.to_string()))?;
        let File { keys } = toml::from_str(&text).map_err(|error| problem(error.to_string()))?;
        if keys.is_empty() {
            return Err(problem("it holds none".into()));
        }
        for (n, key) in keys.iter().enumerate() {
            if keys[..n].iter().any(|other| other.name == key.name) {
                return Err(problem(format!("two are called `{}`", key.name)));
            }
            if key.requests_per_minute == Some(0) || key.tokens_per_minute == Some(0) {
                return Err(problem(format!("`{}` may have 0 a minute: take the key out instead", key.name)));
            }
        }
        let metered = |key: Key| {
            let meter = Arc::new(Meter::new(key.rates()));
            (key, meter)
        };
        Ok(Self { keys: Some(keys.into_iter().map(metered).collect()) })
    }

    /// Takes over what keys of the same name and limits have used of them.
    pub(super) fn go_on_from(&mut self, before: &Self) {
        for (key, meter) in self.keys.iter_mut().flatten() {
            let same = |(old, known): &&(Key, Arc<Meter>)| old.name == key.name && known.rates() == key.rates();
            if let Some((_, known)) = before.keys.iter().flatten().find(same) {
                *meter = Arc::clone(known);
            }
        }
    }

    pub fn is_none(&self) -> bool {
        self.keys.is_none()
    }

    /// Whose key a request brings (`Authorization: Bearer KEY`).
    pub(super) fn caller(&self, headers: &HeaderMap) -> Result<Caller, ApiError> {
        let traceparent = headers.get("traceparent").and_then(|value| value.to_str().ok()).map(str::to_owned);
        let Some(keys) = &self.keys else {
            return Ok(Caller { name: None, role: Role::Admin, meter: None, traceparent });
        };
        let brought = headers
            .get(AUTHORIZATION)
            .ok_or_else(|| ApiError::unauthorized("no key was given: send it as `Authorization: Bearer KEY`"))?;
        let key = brought.to_str().ok().and_then(|text| {
            let (scheme, key) = text.split_once(' ')?;
            scheme.eq_ignore_ascii_case("bearer").then(|| key.trim())
        });
        let wrong = || ApiError::unauthorized("this key is not known");
        let found = Digest::of(key.ok_or_else(wrong)?.as_bytes()).to_string();
        // All of them are looked at, each to its end, so that the time tells nothing.
        let mut caller = None;
        for (key, meter) in keys {
            if bool::from(key.sha256.to_string().as_bytes().ct_eq(found.as_bytes())) {
                caller = Some(Caller {
                    name: Some(key.name.clone()),
                    role: key.role,
                    meter: Some(Arc::clone(meter)),
                    traceparent: traceparent.clone(),
                });
            }
        }
        caller.ok_or_else(wrong)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys() -> Keys {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keys.toml");
        let of = |key: &str| Digest::of(key.as_bytes());
        let (app, boss) = (of("sk-app"), of("sk-boss"));
        let text = format!(
            "[[key]]\nname = \"app\"\nsha256 = \"{app}\"\nrole = \"user\"\n[[key]]\nname = \"boss\"\nsha256 = \"{boss}\"\nrole = \"admin\"\n"
        );
        std::fs::write(&path, text).unwrap();
        Keys::load(&path).unwrap()
    }

    fn headers(value: &str) -> HeaderMap {
        HeaderMap::from_iter([(AUTHORIZATION, value.parse().unwrap())])
    }

    #[test]
    fn a_key_says_who_asks() {
        let keys = keys();
        let caller = keys.caller(&headers("Bearer sk-app")).unwrap();
        assert_eq!((caller.name.as_deref(), caller.role), (Some("app"), Role::User));
        assert_eq!(keys.caller(&headers("bearer sk-boss")).unwrap().role, Role::Admin);
        for wrong in ["Bearer sk-ap", "Bearer sk-app2", "Bearer ", "sk-app", "Basic sk-app"] {
            assert_eq!(keys.caller(&headers(wrong)).unwrap_err().status, 401, "{wrong}");
        }
        assert_eq!(keys.caller(&HeaderMap::new()).unwrap_err().status, 401);
        assert_eq!(Keys::none().caller(&HeaderMap::new()).unwrap().role, Role::Admin);
    }

    #[test]
    fn what_a_key_has_used_outlives_its_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keys.toml");
        let load = |per_minute: u32| {
            let hash = Digest::of(b"sk-app");
            let text = format!(
                "[[key]]\nname = \"app\"\nsha256 = \"{hash}\"\nrole = \"user\"\nrequests_per_minute = {per_minute}\n"
            );
            std::fs::write(&path, text).unwrap();
            Keys::load(&path).unwrap()
        };
        let ask = |keys: &Keys| keys.caller(&headers("Bearer sk-app")).unwrap().meter.unwrap().request();
        let first = load(1);
        assert!(ask(&first).is_ok() && ask(&first).is_err());
        let mut same = load(1);
        same.go_on_from(&first);
        assert!(ask(&same).is_err());
        let mut other = load(2);
        other.go_on_from(&same);
        assert!(ask(&other).is_ok());
    }

    #[test]
    fn a_file_of_keys_that_asks_for_none_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("keys.toml");
        let twice = "[[key]]\nname = \"a\"\nsha256 = \"0000000000000000000000000000000000000000000000000000000000000000\"\nrole = \"user\"\n".repeat(2);
        let one = twice.split_inclusive("user\"\n").next().unwrap();
        let (none, wrong) = (format!("{one}requests_per_minute = 0\n"), format!("{one}request_per_minute = 1\n"));
        for (text, why) in [
            ("", "holds none"),
            ("key = 1", "invalid"),
            (&twice, "two are called"),
            (&none, "0 a minute"),
            (&wrong, "unknown field"),
        ] {
            std::fs::write(&path, text).unwrap();
            let error = Keys::load(&path).unwrap_err().to_string();
            assert!(error.contains(why) && error.contains("keys.toml"), "{error}");
        }
        assert!(Keys::load(&folder.path().join("none.toml")).is_err());
    }
}
