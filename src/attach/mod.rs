//! What is said to the library that `pilotfish attach` has loaded into an app: at the start by the app's environment, then over its socket.
//!
//! In: the environment, lines of JSON. Out: a [`Policy`], what [`control`] has, or the other way round. The library itself is a crate of its own, `attach/`.

pub mod control;
#[cfg(unix)]
pub mod sockets;

use serde::{Deserialize, Serialize};
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// Names the directory of guards.
pub const GUARDS: &str = "PILOTFISH_ATTACH_GUARDS";
/// Says what an app meets that can't be guarded: `closed` or `open`.
pub const FAIL: &str = "PILOTFISH_ATTACH_FAIL";
/// Names the audit log.
pub const AUDIT: &str = "PILOTFISH_ATTACH_AUDIT";
/// Stands for the process's id in the name of an audit log.
pub const PID: &str = "{pid}";
/// Names the socket; `off` for none.
pub const CONTROL: &str = "PILOTFISH_ATTACH_CONTROL";

/// What an app is to meet whose context can't be guarded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fail {
    /// Decoding returns an error.
    #[default]
    Closed,
    /// It decodes without a guard, and the log says so.
    Open,
}

/// Where an app listens for `pilotfish ctl`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Control {
    /// In the user's own folder of sockets, by its process's id.
    #[default]
    Found,
    At(PathBuf),
    Off,
}

impl Control {
    /// What `path` says: `off` is none.
    pub fn named(path: PathBuf) -> Self {
        if path == Path::new("off") { Self::Off } else { Self::At(path) }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Policy {
    pub guards: PathBuf,
    pub fail: Fail,
    /// The audit log, with [`PID`] in its name or without.
    pub audit: Option<PathBuf>,
    pub control: Control,
}

impl Policy {
    /// What the environment asks for; `None` where it names no directory.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub fn from_environment(variable: impl Fn(&str) -> Option<OsString>) -> Result<Option<Self>, String> {
        let Some(guards) = variable(GUARDS).filter(|guards| !guards.is_empty()) else { return Ok(None) };
        let fail = match variable(FAIL).as_deref().map(|fail| fail.to_string_lossy()).as_deref() {
            None | Some("" | "closed") => Fail::Closed,
            Some("open") => Fail::Open,
            Some(other) => return Err(format!("{FAIL} is `{other}`; it is to be `closed` or `open`")),
        };
        let path = |name| variable(name).filter(|path| !path.is_empty()).map(PathBuf::from);
        let control = match path(CONTROL) {
            None => Control::Found,
            Some(path) => Control::named(path),
        };
        Ok(Some(Self { guards: guards.into(), fail, audit: path(AUDIT), control }))
    }

    /// Variables that say so.
    pub fn to_environment(&self) -> [(&'static str, OsString); 4] {
        let fail = match self.fail {
            Fail::Closed => "closed",
            Fail::Open => "open",
        };
        // Empty is what was not said, also where the environment that is gone on from has something.
        let audit = self.audit.clone().unwrap_or_default();
        let control = match &self.control {
            Control::Found => PathBuf::new(),
            Control::At(path) => path.clone(),
            Control::Off => "off".into(),
        };
        [(GUARDS, self.guards.clone().into()), (FAIL, fail.into()), (AUDIT, audit.into()), (CONTROL, control.into())]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_says_what_is_to_be_done() {
        let policy = |values: &[(&str, &str)]| {
            Policy::from_environment(|name| {
                values.iter().find(|(known, _)| *known == name).map(|(_, value)| value.into())
            })
        };
        let expected = |fail| Policy { guards: "dir".into(), fail, ..Policy::default() };
        assert_eq!(policy(&[]), Ok(None));
        assert_eq!(policy(&[(GUARDS, "")]), Ok(None));
        assert_eq!(policy(&[(GUARDS, "dir")]), Ok(Some(expected(Fail::Closed))));
        assert!(policy(&[(GUARDS, "dir"), (FAIL, "maybe")]).unwrap_err().contains("`maybe`"));
        for fail in [Fail::Closed, Fail::Open] {
            let said = expected(fail).to_environment();
            let read = Policy::from_environment(|name| {
                said.iter().find(|(known, _)| *known == name).map(|(_, value)| value.clone())
            });
            assert_eq!(read, Ok(Some(expected(fail))));
        }
        for control in [Control::Found, Control::At("some.sock".into()), Control::Off] {
            let policy = Policy { audit: Some("audit-{pid}.jsonl".into()), control, ..expected(Fail::Closed) };
            let said = policy.to_environment();
            let read = Policy::from_environment(|name| {
                said.iter().find(|(known, _)| *known == name).map(|(_, value)| value.clone())
            });
            assert_eq!(read, Ok(Some(policy)));
        }
    }
}
