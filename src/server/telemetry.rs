//! Answers as spans of OpenTelemetry, sent to a collector by OTLP over HTTP. Numbers are for `/metrics`, which collectors read as well.
//!
//! Attributes have the names of OpenTelemetry's conventions for generative models (`gen_ai.…`), and what is ours begins with `pilotfish.`. No word of a prompt or
//! an answer is among them.

use super::error::ServerError;
use crate::engine::scheduler::Summary;
use std::time::{Duration, SystemTime};

/// An answer that has come to its end.
pub(super) struct Answered<'a> {
    /// OpenTelemetry's name of what was asked for: `chat` or `text_completion`.
    pub operation: &'static str,
    pub model: &'a str,
    pub id: &'a str,
    /// The request's `traceparent` (W3C), of whose trace this is a part then.
    pub traceparent: Option<&'a str>,
    pub key: Option<&'a str>,
    pub began: SystemTime,
    /// From then on.
    pub first_token: Option<Duration>,
    pub epoch: u64,
    /// Guards that acted.
    pub acted: &'a [String],
    /// Each choice: why it ended, and what there is of it.
    pub choices: Vec<(&'static str, Option<&'a Summary>)>,
    pub error: Option<&'a str>,
}

#[cfg(feature = "otel")]
pub(super) use exporting::Telemetry;

#[cfg(not(feature = "otel"))]
pub(super) enum Telemetry {}

#[cfg(not(feature = "otel"))]
impl Telemetry {
    pub fn start(collector: &str) -> Result<Self, ServerError> {
        let reason = "this pilotfish was built without the feature `otel`".to_owned();
        Err(ServerError::Telemetry { collector: collector.to_owned(), reason })
    }

    pub fn answered(&self, _: &Answered<'_>) {
        match *self {}
    }
}

#[cfg(feature = "otel")]
mod exporting {
    use super::{Answered, Duration, ServerError, SystemTime};
    use crate::engine::scheduler::End;
    use opentelemetry::propagation::TextMapPropagator;
    use opentelemetry::trace::{Event, Span, SpanKind, Status, Tracer, TracerProvider};
    use opentelemetry::{Array, Context, KeyValue, StringValue, Value};
    use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response};
    use opentelemetry_otlp::{SpanExporter, WithExportConfig, WithHttpConfig};
    use opentelemetry_sdk::Resource;
    use opentelemetry_sdk::propagation::TraceContextPropagator;
    use opentelemetry_sdk::trace::{SdkTracer, SdkTracerProvider};
    use std::collections::HashMap;

    /// How long a collector may take for one batch.
    const PATIENCE: Duration = Duration::from_secs(10);

    /// Sends spans in batches, from a thread of its own: a collector that is away holds up nothing.
    pub struct Telemetry {
        provider: SdkTracerProvider,
        tracer: SdkTracer,
    }

    impl Telemetry {
        /// `collector` is its address without a path, `http://127.0.0.1:4318`.
        ///
        /// # Errors
        /// It is no address.
        pub fn start(collector: &str) -> Result<Self, ServerError> {
            let problem = |reason: String| ServerError::Telemetry { collector: collector.to_owned(), reason };
            let exporter = SpanExporter::builder()
                .with_http()
                .with_http_client(Client::new())
                .with_endpoint(format!("{}/v1/traces", collector.trim_end_matches('/')))
                .with_timeout(PATIENCE)
                .build()
                .map_err(|error| problem(error.to_string()))?;
            let version = KeyValue::new("service.version", env!("CARGO_PKG_VERSION"));
            let mut resource = Resource::builder().with_attribute(version);
            // The environment's OTEL_SERVICE_NAME comes first.
            if std::env::var_os("OTEL_SERVICE_NAME").is_none() {
                resource = resource.with_service_name("pilotfish");
            }
            let provider =
                SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource.build()).build();
            let tracer = provider.tracer("pilotfish");
            Ok(Self { provider, tracer })
        }

        pub fn answered(&self, answered: &Answered<'_>) {
            let parent = answered.traceparent.map_or_else(Context::new, |traceparent| {
                let headers = HashMap::from([("traceparent".to_owned(), traceparent.to_owned())]);
                TraceContextPropagator::new().extract_with_context(&Context::new(), &headers)
            });
            let span = self
                .tracer
                .span_builder(format!("{} {}", answered.operation, answered.model))
                .with_kind(SpanKind::Server)
                .with_start_time(answered.began)
                .with_attributes(attributes(answered))
                .with_events(events(answered));
            let mut span = span.start_with_context(&self.tracer, &parent);
            if let Some(error) = answered.error {
                span.set_status(Status::error(error.to_owned()));
            }
            span.end();
        }
    }

    impl Drop for Telemetry {
        /// Sends what is left.
        fn drop(&mut self) {
            if let Err(error) = self.provider.shutdown_with_timeout(Duration::from_secs(2)) {
                tracing::warn!("the last spans are lost: {error}");
            }
        }
    }

    fn attributes(answered: &Answered<'_>) -> Vec<KeyValue> {
        let strings =
            |strings: Vec<String>| Value::Array(Array::String(strings.into_iter().map(StringValue::from).collect()));
        let summaries = || answered.choices.iter().filter_map(|(_, summary)| *summary);
        let tokens = |of: fn(&super::Summary) -> usize| summaries().map(of).sum::<usize>() as i64;
        let finished = answered.choices.iter().map(|(reason, _)| (*reason).to_owned()).collect();
        let mut attributes = vec![
            KeyValue::new("gen_ai.operation.name", answered.operation),
            KeyValue::new("gen_ai.provider.name", "pilotfish"),
            KeyValue::new("gen_ai.response.model", answered.model.to_owned()),
            KeyValue::new("gen_ai.response.id", answered.id.to_owned()),
            KeyValue::new("gen_ai.response.finish_reasons", strings(finished)),
            KeyValue::new("gen_ai.usage.input_tokens", tokens(|summary| summary.prompt_tokens)),
            KeyValue::new("gen_ai.usage.output_tokens", tokens(|summary| summary.tokens)),
            KeyValue::new("pilotfish.usage.reused_tokens", tokens(|summary| summary.reused_tokens)),
            KeyValue::new("pilotfish.epoch", answered.epoch as i64),
            KeyValue::new("pilotfish.acted", strings(answered.acted.to_vec())),
            KeyValue::new("pilotfish.blocked", summaries().any(|summary| matches!(summary.end, End::Blocked(_)))),
        ];
        attributes.extend(answered.key.map(|key| KeyValue::new("pilotfish.key", key.to_owned())));
        attributes
    }

    /// The first token, and what each gate read.
    fn events(answered: &Answered<'_>) -> Vec<Event> {
        let first = answered.first_token.map(|after| Event::new("first token", answered.began + after, Vec::new(), 0));
        let gates = answered.choices.iter().enumerate().flat_map(|(choice, (_, summary))| {
            let readings = summary.iter().flat_map(|summary| &summary.gates);
            readings.map(move |gate| {
                let mut attributes = vec![
                    KeyValue::new("pilotfish.gate", gate.gate.clone()),
                    KeyValue::new("pilotfish.choice", choice as i64),
                    KeyValue::new("pilotfish.fired", gate.fired),
                ];
                attributes.extend(gate.score.map(|score| KeyValue::new("pilotfish.score", score)));
                Event::new("gate", SystemTime::now(), attributes, 0)
            })
        });
        first.into_iter().chain(gates).collect()
    }

    /// What the exporter sends by: blocking, in the exporter's own thread.
    #[derive(Debug)]
    struct Client(ureq::Agent);

    impl Client {
        fn new() -> Self {
            let config = ureq::Agent::config_builder().timeout_global(Some(PATIENCE)).http_status_as_error(false);
            Self(config.build().into())
        }
    }

    #[async_trait::async_trait]
    impl HttpClient for Client {
        async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
            let (head, body) = request.into_parts();
            let answer = self.0.run(Request::from_parts(head, &body[..]))?;
            let (head, mut body) = answer.into_parts();
            let body = body.read_to_vec()?;
            Ok(Response::from_parts(head, Bytes::from(body)))
        }
    }
}
