//! Interventions but for their strengths: what they become at one.

use super::{LowRank, Op, Response, Rotate, Write};
use crate::guard;
use crate::mapping::{AffineMap, Factors, ResidualMap};
use std::sync::Arc;

/// An intervention at no strength in particular. What is as large as a matrix is shared by all strengths.
#[derive(Debug, Clone)]
pub(super) enum Form {
    Add {
        vector: Arc<[f32]>,
        deviation: Option<f64>,
    },
    Ablate {
        unit: Arc<[f32]>,
        mean: f64,
    },
    Clamp {
        unit: Arc<[f32]>,
        low: f64,
        high: f64,
    },
    Rotate {
        unit: Arc<[f32]>,
        angle: f64,
    },
    /// At strength 1.
    Switch(LowRank),
}

impl Form {
    /// Whether its matrices, which no strength changes, hold numbers alone.
    pub fn is_finite(&self) -> bool {
        if let Self::Switch(op) = self { op.is_finite() } else { true }
    }

    pub fn is_switch(&self) -> bool {
        matches!(self, Self::Switch(_))
    }

    /// What it does at `strength`; `None` where that does not fit in `f32`. Costs a few passes over rows, and none over a matrix.
    pub fn at(&self, strength: f32) -> Option<Op> {
        let op = match self {
            Self::Add { vector, deviation } => {
                let scale = guard::multiplier(f64::from(strength), *deviation, vector);
                LowRank { bias: Some(vector.iter().map(|x| scale * x).collect()), ..LowRank::nothing() }
            }
            // `x + s (b − v̂·x) v̂` is one column of `−s v̂`, which `v̂·x − b` multiplies.
            Self::Ablate { unit, mean } => rank_one(unit, -mean, Response::Identity, -strength),
            Self::Clamp { unit, low, high } => {
                rank_one(unit, 0.0, Response::Clip { low: *low as f32, high: *high as f32 }, strength)
            }
            Self::Rotate { unit, angle } => {
                let (sin, cos) = (f64::from(strength) * angle).clamp(-180.0, 180.0).to_radians().sin_cos();
                let direction = Arc::clone(unit);
                return Some(Op::Rotate(Rotate { direction, sin: sin as f32, cos: cos as f32 }));
            }
            // `x + λ (f(x) − x)`
            Self::Switch(full) => {
                let keep = (1.0 - f64::from(strength) * (1.0 - f64::from(full.keep))) as f32;
                let bias = full.bias.as_ref().map(|bias| bias.iter().map(|b| strength * b).collect());
                let op = LowRank { keep, gain: strength, bias, ..full.clone() };
                let bias = op.bias.as_deref().unwrap_or_default();
                let sane = bias.iter().all(|b| b.is_finite()) && keep.is_finite();
                return sane.then_some(Op::LowRank(op));
            }
        };
        op.is_finite().then_some(Op::LowRank(op))
    }
}

fn rank_one(unit: &Arc<[f32]>, offset: f64, response: Response, scale: f32) -> LowRank {
    LowRank {
        offset: Box::new([offset as f32]),
        response: Box::new([response]),
        write: Write::Columns(unit.iter().map(|v| scale * v).collect()),
        read: Arc::clone(unit),
        ..LowRank::nothing()
    }
}

/// `f(x)`, standardization folded in.
pub(super) fn switch(map: &ResidualMap) -> LowRank {
    match map {
        ResidualMap::Affine(map) if map.is_correction() && map.factors().is_some() => {
            map.factors().map_or_else(LowRank::nothing, |factors| correction(map, factors))
        }
        ResidualMap::Affine(map) => {
            let width = map.source_width();
            let (source, target, weight) = (map.source(), map.target(), map.weight());
            let mut read = Vec::with_capacity(width * width);
            let mut offset = Vec::with_capacity(width);
            for out in 0..width {
                let scale = f64::from(target.scale[out]);
                let mut constant = f64::from(target.mean[out]);
                for from in 0..width {
                    let a = scale * f64::from(weight[from * width + out]) / f64::from(source.scale[from]);
                    constant -= a * f64::from(source.mean[from]);
                    read.push(a as f32);
                }
                offset.push(constant as f32);
            }
            LowRank {
                keep: if map.is_correction() { 1.0 } else { 0.0 },
                read: read.into(),
                response: vec![Response::Identity; offset.len()].into(),
                offset: offset.into(),
                write: Write::Identity,
                ..LowRank::nothing()
            }
        }
        ResidualMap::Autoencoder(map) => {
            let (width, hidden) = (map.source_width(), map.hidden_width());
            let (source, target, weights) = (map.source(), map.target(), map.weights());
            let mut read = Vec::with_capacity(hidden * width);
            let mut offset = Vec::with_capacity(hidden);
            for (row, bias) in weights.encoder.chunks_exact(width).zip(&weights.encoder_bias) {
                let mut constant = f64::from(*bias);
                for (weight, (mean, scale)) in row.iter().zip(source.mean.iter().zip(&source.scale)) {
                    let a = f64::from(*weight) / f64::from(*scale);
                    constant -= a * f64::from(*mean);
                    read.push(a as f32);
                }
                offset.push(constant as f32);
            }
            let scaled = |out: usize, value: f32| f64::from(target.scale[out]) * f64::from(value);
            let columns = (0..hidden)
                .flat_map(|unit| (0..width).map(move |out| scaled(out, weights.decoder[out * hidden + unit]) as f32));
            let bias =
                (0..width).map(|out| (f64::from(target.mean[out]) + scaled(out, weights.decoder_bias[out])) as f32);
            LowRank {
                keep: 0.0,
                read: read.into(),
                offset: offset.into(),
                response: vec![Response::Relu; hidden].into(),
                write: Write::Columns(columns.collect()),
                bias: Some(bias.collect()),
                ..LowRank::nothing()
            }
        }
    }
}

/// `x + f(x)` with `f` of low rank: as many columns, and nothing as large as the width squared.
fn correction(map: &AffineMap, factors: &Factors) -> LowRank {
    let (width, rank) = (map.source_width(), factors.rank);
    let (source, target) = (map.source(), map.target());
    let mut read = Vec::with_capacity(rank * width);
    let mut offset = Vec::with_capacity(rank);
    for column in 0..rank {
        let mut constant = 0.0;
        for from in 0..width {
            let a = f64::from(factors.left[from * rank + column]) / f64::from(source.scale[from]);
            constant -= a * f64::from(source.mean[from]);
            read.push(a as f32);
        }
        offset.push(constant as f32);
    }
    let rows = factors.right.chunks_exact(width);
    let columns = rows.flat_map(|row| row.iter().zip(&target.scale).map(|(right, scale)| right * scale)).collect();
    LowRank {
        read: read.into(),
        response: vec![Response::Identity; rank].into(),
        offset: offset.into(),
        write: Write::Columns(columns),
        bias: Some(target.mean.as_slice().into()),
        ..LowRank::nothing()
    }
}

impl LowRank {
    /// `y = x`
    fn nothing() -> Self {
        Self {
            keep: 1.0,
            read: Arc::default(),
            offset: Box::default(),
            response: Box::default(),
            gain: 1.0,
            write: Write::Columns(Arc::default()),
            bias: None,
        }
    }

    fn is_finite(&self) -> bool {
        let columns: &[f32] = match &self.write {
            Write::Columns(columns) => columns,
            Write::Identity => &[],
        };
        let bias = self.bias.as_deref().unwrap_or_default();
        let all = [&*self.read, &self.offset, columns, bias, &[self.keep, self.gain]];
        all.iter().all(|values| values.iter().all(|value| value.is_finite()))
    }
}
