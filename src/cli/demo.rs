use super::Outcome;
use super::args::DemoArguments;
use anyhow::bail;
pub fn demo(_: DemoArguments) -> anyhow::Result<Outcome> { bail!("todo") }
