//! `/v1/guards`: what is in force, and an admin's changes to it.

use super::body::{Fields, refuse};
use super::error::ApiError;
use super::keeper::ChangeError;
use super::keys::{Caller, Role};
use super::parameters::setting;
use super::snapshot::{GuardState, Snapshot};
use super::state::State;
use crate::guard::OnFire;
use crate::program::Change;
use axum::body::Body;
use axum::extract::Path;
use axum::extract::rejection::PathRejection;
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use axum::{Json, extract};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::UNIX_EPOCH;

pub(super) async fn list(extract::State(state): extract::State<Arc<State>>, headers: HeaderMap) -> Response {
    let listed = state.keys.load().caller(&headers).map(|_| Json(snapshot_json(&state.keeper.current())));
    listed.map_or_else(ApiError::into_response, IntoResponse::into_response)
}

/// `GET /v1/guard/history`: what has become of the guards, the newest first.
pub(super) async fn history(extract::State(state): extract::State<Arc<State>>, headers: HeaderMap) -> Response {
    match state.keys.load().caller(&headers) {
        Ok(_) => Json(json!({ "object": "list", "data": state.keeper.history().entries() })).into_response(),
        Err(error) => error.into_response(),
    }
}

/// `PATCH /v1/guards/NAME`: `{"enabled": bool, "interventions": {"NAME": "on" | "off" | STRENGTH | null}}`, null being the guard's own again.
pub(super) async fn change(
    extract::State(state): extract::State<Arc<State>>,
    name: Result<Path<String>, PathRejection>,
    headers: HeaderMap,
    body: Body,
) -> Response {
    let Ok(Path(name)) = name else { return ApiError::not_found("the name is not UTF-8").into_response() };
    match changed(&state, name, &headers, body).await {
        Ok(snapshot) => Json(snapshot_json(&snapshot)).into_response(),
        Err(error) => error.into_response(),
    }
}

async fn changed(state: &Arc<State>, name: String, headers: &HeaderMap, body: Body) -> Result<Arc<Snapshot>, ApiError> {
    let admin = |caller: Caller| {
        let is_one = caller.role >= Role::Admin;
        is_one
            .then_some(caller)
            .ok_or_else(|| ApiError::forbidden("only a key of the role `admin` may change a guard for all"))
    };
    let caller = match state.keys.load().caller(headers).and_then(admin) {
        Ok(caller) => caller,
        Err(error) => return Err(refuse(state, body, error).await),
    };
    let fields = Fields::read(state, body).await?;
    let mut changes = Vec::new();
    if let Some(enabled) = fields.bool("enabled")? {
        changes.push(Change::Enabled(enabled));
    }
    for (intervention, value) in fields.object("interventions")?.into_iter().flatten() {
        let intervention = intervention.clone();
        changes.push(match value {
            Value::Null => Change::Reset { intervention },
            value => Change::Set { intervention, setting: setting("interventions", value)? },
        });
    }
    if changes.is_empty() {
        return Err(ApiError::body("nothing is to be changed: give `enabled` or `interventions`"));
    }
    let snapshot =
        state.keeper.change(name.clone(), changes, caller.name.clone()).await.map_err(|error| match error {
            ChangeError::NoGuard(_) => ApiError::not_found(error.to_string()),
            ChangeError::Refused(reason) => ApiError::invalid("interventions", reason),
            ChangeError::Ends => ApiError::unavailable(error.to_string()),
        })?;
    if let Some(audit) = &state.audit {
        let record = json!({ "event": "change", "key": caller.name, "guard": name, "epoch": snapshot.epoch, "guards": snapshot_json(&snapshot)["data"] });
        state.write_down(audit, record).await?;
    }
    Ok(snapshot)
}

pub(super) fn snapshot_json(snapshot: &Snapshot) -> Value {
    let since = snapshot.since.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64();
    json!({
        "object": "list",
        "epoch": snapshot.epoch,
        "since": since,
        "problem": snapshot.problem,
        "data": snapshot.guards.iter().map(|state| guard_json(snapshot, state)).collect::<Vec<_>>(),
    })
}

fn guard_json(snapshot: &Snapshot, state: &GuardState) -> Value {
    let mut shown = json!({
        "object": "guard",
        "folder": state.folder,
        "enabled": state.changed.enabled,
        "in_force": state.changed.enabled && state.guard.is_some(),
        "problem": state.problem,
    });
    let Some(guard) = &state.guard else { return shown };
    let strength = |name: &str| {
        let name = snapshot.name_in_program(guard.name(), name);
        let found = snapshot.program.interventions().find(|(dial, _)| dial.name == name);
        found.filter(|_| state.changed.enabled).map(|(_, strength)| strength)
    };
    let gates: Vec<Value> = guard
        .gates()
        .iter()
        .map(|gate| {
            json!({
                "name": gate.name,
                "layer": guard.vectors()[gate.vector].layer.0,
                "reads": gate.scope.to_string(),
                "threshold": gate.threshold,
                "on_fire": match gate.on_fire { OnFire::Block => "block", OnFire::Steer => "steer" },
            })
        })
        .collect();
    let interventions: Vec<Value> = guard
        .interventions()
        .iter()
        .map(|intervention| {
            json!({
                "name": intervention.name,
                "kind": intervention.kind.name(),
                "layer": guard.layer_of(intervention).0,
                "strength": strength(&intervention.name),
                "strength_of_guard": intervention.strength,
                "when": intervention.when.as_ref().map(|rule| guard.written(rule)),
            })
        })
        .collect();
    let more = json!({
        "name": guard.name(),
        "description": guard.description(),
        "content": guard.content_hash().to_string(),
        "target": { "architecture": guard.target().architecture, "fingerprint": guard.target().fingerprint.to_string() },
        "source": guard.source().map(|source| json!({ "model": source.model, "fingerprint": source.fingerprint.to_string() })),
        "gates": gates,
        "interventions": interventions,
        "settings": state.changed.settings,
        "results": guard.results(),
    });
    if let (Value::Object(shown), Value::Object(more)) = (&mut shown, more) {
        shown.extend(more);
    }
    shown
}
