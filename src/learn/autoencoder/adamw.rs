use candle_core::{CpuStorage, InplaceOp2, InplaceOp3, Layout, Result, Tensor, bail};

const BETA_1: f64 = 0.9;
const BETA_2: f64 = 0.999;
const EPSILON: f64 = 1e-8;

/// AdamW (Loshchilov and Hutter, arXiv 1711.05101) with PyTorch's constants, which decays biases too:
/// `m ← β₁m + (1−β₁)g`, `v ← β₂v + (1−β₂)g²`, `p ← p − ηλp − η m̂ / (√v̂ + ε)` with `m̂ = m/(1−β₁ᵗ)` and `v̂ = v/(1−β₂ᵗ)`.
///
/// candle's own keeps its moments to itself, so it could not go on from a checkpoint, and makes a dozen tensors a step.
pub(super) struct AdamW {
    pub learning_rate: f64,
    pub weight_decay: f64,
    /// Steps done, `t`.
    pub steps: u64,
    /// `m` and `v` of each parameter.
    pub moments: [[Tensor; 2]; 4],
}

impl AdamW {
    pub fn new(parameters: &[Tensor; 4], learning_rate: f64, weight_decay: f64) -> Result<Self> {
        let [a, b, c, d] = parameters
            .each_ref()
            .map(|parameter| -> Result<[Tensor; 2]> { Ok([parameter.zeros_like()?, parameter.zeros_like()?]) });
        Ok(Self { learning_rate, weight_decay, steps: 0, moments: [a?, b?, c?, d?] })
    }

    pub fn step(&mut self, parameters: &mut [Tensor; 4], gradients: &[Tensor; 4]) -> Result<()> {
        self.steps += 1;
        let correction = |beta: f64| 1.0 - beta.powf(self.steps as f64);
        let update = Update {
            decay: 1.0 - self.learning_rate * self.weight_decay,
            rate: self.learning_rate / correction(BETA_1),
            second: 1.0 / correction(BETA_2),
        };
        for ((parameter, moments), gradient) in parameters.iter_mut().zip(&mut self.moments).zip(gradients) {
            if parameter.device().is_cpu() {
                update.in_place(parameter, moments, gradient)?;
            } else {
                update.by_tensors(parameter, moments, gradient)?;
            }
        }
        Ok(())
    }
}

/// What a step does to every parameter alike.
struct Update {
    /// `1 − ηλ`
    decay: f64,
    /// `η/(1−β₁ᵗ)`
    rate: f64,
    /// `1/(1−β₂ᵗ)`
    second: f64,
}

impl Update {
    /// In one pass over each of `m`, `v` and `p`, with nothing allocated.
    fn in_place(&self, parameter: &Tensor, [m, v]: &[Tensor; 2], gradient: &Tensor) -> Result<()> {
        m.inplace_op2(gradient, &Moment { beta: BETA_1, squared: false })?;
        v.inplace_op2(gradient, &Moment { beta: BETA_2, squared: true })?;
        parameter.inplace_op3(m, v, self)
    }

    fn by_tensors(&self, parameter: &mut Tensor, [m, v]: &mut [Tensor; 2], gradient: &Tensor) -> Result<()> {
        *m = ((&*m * BETA_1)? + (gradient * (1.0 - BETA_1))?)?;
        *v = ((&*v * BETA_2)? + (gradient.sqr()? * (1.0 - BETA_2))?)?;
        let divisor = ((&*v * self.second)?.sqrt()? + EPSILON)?;
        *parameter = ((&*parameter * self.decay)? - ((&*m * self.rate)? / divisor)?)?;
        Ok(())
    }
}

/// `m ← βm + (1−β)g`, or of `g²`.
struct Moment {
    beta: f64,
    squared: bool,
}

impl InplaceOp2 for Moment {
    fn name(&self) -> &'static str {
        "adamw-moment"
    }

    fn cpu_fwd(&self, m: &mut CpuStorage, lm: &Layout, g: &CpuStorage, lg: &Layout) -> Result<()> {
        let (beta, rest) = (self.beta as f32, (1.0 - self.beta) as f32);
        let pairs = values_mut(m, lm)?.iter_mut().zip(values(g, lg)?);
        if self.squared {
            pairs.for_each(|(m, g)| *m = beta * *m + rest * (g * g));
        } else {
            pairs.for_each(|(m, g)| *m = beta * *m + rest * g);
        }
        Ok(())
    }
}

impl InplaceOp3 for Update {
    fn name(&self) -> &'static str {
        "adamw-update"
    }

    fn cpu_fwd(
        &self,
        p: &mut CpuStorage,
        lp: &Layout,
        m: &CpuStorage,
        lm: &Layout,
        v: &CpuStorage,
        lv: &Layout,
    ) -> Result<()> {
        let (decay, rate, second, epsilon) = (self.decay as f32, self.rate as f32, self.second as f32, EPSILON as f32);
        for (p, (m, v)) in values_mut(p, lp)?.iter_mut().zip(values(m, lm)?.iter().zip(values(v, lv)?)) {
            *p = decay * *p - rate * m / ((v * second).sqrt() + epsilon);
        }
        Ok(())
    }
}

fn values<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let (start, end) = whole(layout)?;
    Ok(&storage.as_slice::<f32>()?[start..end])
}

fn values_mut<'a>(storage: &'a mut CpuStorage, layout: &Layout) -> Result<&'a mut [f32]> {
    let (start, end) = whole(layout)?;
    match storage {
        CpuStorage::F32(values) => Ok(&mut values[start..end]),
        _ => bail!("a parameter that is not `f32`"),
    }
}

fn whole(layout: &Layout) -> Result<(usize, usize)> {
    match layout.contiguous_offsets() {
        Some(offsets) => Ok(offsets),
        None => bail!("a parameter with strides {:?}", layout.stride()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    fn vector(values: &[f32]) -> Tensor {
        Tensor::new(values, &Device::Cpu).unwrap()
    }

    /// Both ways against the formulas in `f64`.
    #[test]
    fn steps_are_those_of_f64() {
        let gradients = [[0.5f32, -2.0, 1e-3, 0.0], [-0.25, -2.5, 3e-3, 1.0], [4.0, 0.1, -1e-3, 0.0]];
        let start = [1.0f32, -1.0, 0.5, 2.0];
        let (rate, weight_decay) = (0.01, 0.1);
        let (mut p, mut m, mut v) = (start.map(f64::from), [0.0f64; 4], [0.0f64; 4]);
        let four = |values: &[f32]| [0; 4].map(|_| vector(values));
        let mut parameters = four(&start);
        let mut adamw = AdamW::new(&parameters, rate, weight_decay).unwrap();
        let (mut tensors, mut moments) = (vector(&start), [vector(&[0.0; 4]), vector(&[0.0; 4])]);
        for (step, gradient) in gradients.iter().enumerate() {
            let t = step as i32 + 1;
            for index in 0..4 {
                let g = f64::from(gradient[index]);
                m[index] = 0.9 * m[index] + 0.1 * g;
                v[index] = 0.999 * v[index] + 0.001 * g * g;
                let (first, second) = (m[index] / (1.0 - 0.9f64.powi(t)), v[index] / (1.0 - 0.999f64.powi(t)));
                p[index] -= rate * weight_decay * p[index] + rate * first / (second.sqrt() + 1e-8);
            }
            adamw.step(&mut parameters, &four(gradient)).unwrap();
            let update = Update {
                decay: 1.0 - rate * weight_decay,
                rate: rate / (1.0 - 0.9f64.powi(t)),
                second: 1.0 / (1.0 - 0.999f64.powi(t)),
            };
            update.by_tensors(&mut tensors, &mut moments, &vector(gradient)).unwrap();
        }
        for found in parameters.iter().chain([&tensors]) {
            for (found, expected) in found.to_vec1::<f32>().unwrap().iter().zip(&p) {
                assert!((f64::from(*found) - expected).abs() < 1e-6, "{found} {expected}");
            }
        }
        assert_eq!(adamw.steps, 3);
    }
}
