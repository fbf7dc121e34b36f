//! Requests' bodies, and their fields with OpenAI's errors for what is wrong with one.

use super::error::ApiError;
use super::keys::Caller;
use super::state::State;
use axum::body::Body;
use axum::http::HeaderMap;
use http_body_util::BodyExt;
use serde_json::{Map, Value};
use std::sync::Arc;
use tokio::sync::OwnedSemaphorePermit;

/// A JSON object that a request brings.
#[derive(Debug)]
pub(super) struct Fields {
    fields: Map<String, Value>,
    /// What it takes of the memory for bodies, until it is dropped.
    _memory: Option<OwnedSemaphorePermit>,
}

/// What is let go of a body that is not read, in multiples of what may be read.
const LET_GO: usize = 8;

/// Lets a refused request send what it has still to send, some multiples of what is allowed: a client that is answered in the middle of sending would find its
/// connection broken and not its answer.
pub(super) async fn refuse(state: &State, mut body: Body, error: ApiError) -> ApiError {
    let limits = &state.config.limits;
    let _ = tokio::time::timeout(limits.read(), let_go(&mut body, limits.body_bytes)).await;
    error
}

async fn let_go(body: &mut Body, limit: usize) {
    let mut left = limit.saturating_mul(LET_GO);
    while let Some(Ok(frame)) = body.frame().await {
        let n_bytes = frame.data_ref().map_or(0, |data| data.len());
        match left.checked_sub(n_bytes) {
            Some(less) => left = less,
            None => break,
        }
    }
}

/// A body of up to `limit` bytes.
async fn bytes(mut body: Body, limit: usize) -> Result<Vec<u8>, ApiError> {
    let mut bytes = Vec::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| ApiError::body(error.to_string()))?;
        let Some(data) = frame.data_ref() else { continue };
        if bytes.len() + data.len() > limit {
            drop(bytes);
            let_go(&mut body, limit).await;
            return Err(ApiError::too_large(limit));
        }
        bytes.extend_from_slice(data);
    }
    Ok(bytes)
}

/// Who asks the model for something, and for what.
///
/// # Errors
/// It is nobody who may, or not now; or it is nothing that can be read.
pub(super) async fn asked(state: &State, headers: &HeaderMap, body: Body) -> Result<(Caller, Fields), ApiError> {
    let may = |caller: Caller| caller.meter.as_ref().map_or(Ok(()), |meter| meter.request()).map(|()| caller);
    match state.keys.load().caller(headers).and_then(may) {
        Ok(caller) => Ok((caller, Fields::read(state, body).await?)),
        Err(error) => Err(refuse(state, body, error).await),
    }
}

impl Fields {
    /// Reads a body: no more bytes than are allowed, in no more time. No more of them are in memory at once than may be; the others wait in their connections.
    pub async fn read(state: &State, body: Body) -> Result<Self, ApiError> {
        let limits = &state.config.limits;
        let memory = tokio::time::timeout(limits.read(), Arc::clone(&state.bodies).acquire_owned()).await;
        let memory = memory.map_err(|_| ApiError::unavailable("too many requests are read at once"))?.ok();
        let bytes = tokio::time::timeout(limits.read(), bytes(body, limits.body_bytes)).await;
        let bytes = bytes.map_err(|_| ApiError::timeout("the request's body did not come in time"))??;
        Ok(Self { _memory: memory, ..Self::parse(&bytes)? })
    }

    fn parse(bytes: &[u8]) -> Result<Self, ApiError> {
        // Nested deeper than 128 it is refused, and so is what is no UTF-8.
        match serde_json::from_slice(bytes) {
            Ok(Value::Object(fields)) => Ok(Self { fields, _memory: None }),
            Ok(other) => Err(ApiError::body(format!("the body is {}, where an object is wanted", kind(&other)))),
            Err(error) => Err(ApiError::body(format!("the body is no JSON: {error}"))),
        }
    }

    #[cfg(test)]
    pub fn of(value: Value) -> Self {
        Self::parse(value.to_string().as_bytes()).unwrap()
    }

    /// A field that is there and not null.
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.fields.get(name).filter(|value| !value.is_null())
    }

    pub fn required(&self, name: &str) -> Result<&Value, ApiError> {
        self.get(name).ok_or_else(|| {
            let error = ApiError::invalid(name, format!("`{name}` is missing"));
            ApiError { code: Some("missing_required_parameter"), ..error }
        })
    }

    pub fn bool(&self, name: &str) -> Result<Option<bool>, ApiError> {
        self.get(name).map(|value| value.as_bool().ok_or_else(|| wrong_type(name, "a boolean", value))).transpose()
    }

    /// A number from `low` to `high`.
    pub fn number(&self, name: &str, low: f64, high: f64) -> Result<Option<f64>, ApiError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let number = value.as_f64().ok_or_else(|| wrong_type(name, "a number", value))?;
        if (low..=high).contains(&number) {
            return Ok(Some(number));
        }
        Err(ApiError::invalid(name, format!("`{name}` is {number}, where {low} to {high} is wanted")))
    }

    /// An integer from `low` to `high`.
    pub fn integer(&self, name: &str, low: i64, high: i64) -> Result<Option<i64>, ApiError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        // 3.0 is one too.
        let whole = |number: f64| (number.fract() == 0.0 && number.abs() < 9e15).then_some(number as i64);
        let number = value.as_i64().or_else(|| value.as_f64().and_then(whole));
        let number = number.ok_or_else(|| wrong_type(name, "an integer", value))?;
        if (low..=high).contains(&number) {
            return Ok(Some(number));
        }
        Err(ApiError::invalid(name, format!("`{name}` is {number}, where {low} to {high} is wanted")))
    }

    /// A string or several.
    pub fn texts(&self, name: &str, most: usize) -> Result<Vec<String>, ApiError> {
        let texts = match self.get(name) {
            None => return Ok(Vec::new()),
            Some(Value::String(text)) => vec![text.clone()],
            Some(Value::Array(values)) => {
                let text = |value: &Value| value.as_str().map(str::to_owned);
                let texts: Option<Vec<String>> = values.iter().map(text).collect();
                texts.ok_or_else(|| wrong_type(name, "a string or an array of strings", &values[0]))?
            }
            Some(other) => return Err(wrong_type(name, "a string or an array of strings", other)),
        };
        if texts.len() > most {
            return Err(ApiError::invalid(
                name,
                format!("`{name}` has {} strings, where {most} is the most", texts.len()),
            ));
        }
        Ok(texts)
    }

    pub fn object(&self, name: &str) -> Result<Option<&Map<String, Value>>, ApiError> {
        self.get(name).map(|value| value.as_object().ok_or_else(|| wrong_type(name, "an object", value))).transpose()
    }
}

pub(super) fn wrong_type(name: &str, wanted: &str, found: &Value) -> ApiError {
    let error = ApiError::invalid(
        name,
        format!("invalid type for `{name}`: expected {wanted}, but got {} instead", kind(found)),
    );
    ApiError { code: Some("invalid_type"), ..error }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn wrong_fields_are_named() {
        let fields =
            Fields::of(json!({ "t": "hot", "n": 3, "x": 2.5, "s": ["a", 1], "many": ["a", "b"], "none": null }));
        let told = |error: ApiError| (error.param.unwrap(), error.code.unwrap(), error.message);
        let (param, code, message) = told(fields.number("t", 0.0, 2.0).unwrap_err());
        assert_eq!((param.as_str(), code), ("t", "invalid_type"));
        assert_eq!(message, "invalid type for `t`: expected a number, but got a string instead");
        assert_eq!(told(fields.number("n", 0.0, 2.0).unwrap_err()).2, "`n` is 3, where 0 to 2 is wanted");
        assert_eq!(told(fields.integer("x", 0, 9).unwrap_err()).1, "invalid_type");
        assert_eq!(told(fields.texts("s", 4).unwrap_err()).0, "s");
        assert_eq!(told(fields.texts("many", 1).unwrap_err()).0, "many");
        assert_eq!(told(fields.required("none").map(|_| ()).unwrap_err()).1, "missing_required_parameter");
        assert_eq!(fields.integer("none", 0, 1), Ok(None));
        assert_eq!(Fields::of(json!({ "n": 3.0 })).integer("n", 0, 9), Ok(Some(3)));
    }

    #[test]
    fn what_is_no_object_is_refused() {
        let deep = "[".repeat(100_000);
        for bytes in [&b"[1]"[..], b"", b"{", b"{\"a\": \xff}", deep.as_bytes()] {
            let error = Fields::parse(bytes).err().unwrap();
            assert_eq!((error.status.as_u16(), error.code), (400, Some("invalid_body")));
        }
    }
}
