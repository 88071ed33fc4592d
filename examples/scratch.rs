use labpipe::engine::BurnEngine;
use labpipe::event::NullProgress;
use labpipe::inference::*;
use labpipe::units::DType;
fn main() {
    let dtype = match std::env::args().nth(1).as_deref() {
        Some("f32") => DType::F32,
        Some("bf16") => DType::Bf16,
        _ => DType::F16,
    };
    let q = std::env::args().nth(2).map(|s| labpipe::quantization::QuantizationConfig {
        name: s.clone(),
        scheme: Some(labpipe_kernels::SchemeSpec {
            scheme: s,
            block_size: None,
            double_quant: false,
            symmetric: false,
        }),
        compute_dtype: None,
        keep: vec![],
        overrides: vec![],
    });
    let recipe = ModelRecipe {
        source: ModelSource::Random { config: "tests/fixtures/smollm2-135m/config.json".into(), seed: 1 },
        dtype: Some(dtype),
        compute_dtype: None,
        quantization: q,
    };
    let t = std::time::Instant::now();
    let mut m = BurnEngine::cpu().open(&recipe, &NullProgress).unwrap();
    println!("open {:.2} s, {} MB", t.elapsed().as_secs_f64(), m.weights_bytes() / 1000000);
    m.reserve(700).unwrap();
    let toks: Vec<u32> = (0..512).map(|i| (i * 7919 % 49152) as u32).collect();
    for _ in 0..3 {
        let p = m.prefill(&toks).unwrap();
        println!("pp512 {:.1} t/s", 512.0 / p.duration_s);
    }
    m.prefill(&toks[..1]).unwrap();
    let d = m.decode(64).unwrap();
    let s: f64 = d.iter().map(|d| d.duration_s).sum();
    println!("tg64 {:.1} t/s", 64.0 / s);
    m.prefill(&toks).unwrap();
    let d = m.decode(64).unwrap();
    let s: f64 = d.iter().map(|d| d.duration_s).sum();
    println!("tg64@d512 {:.1} t/s", 64.0 / s);
    let t = std::time::Instant::now();
    m.score(&toks, 1).unwrap();
    println!("score {:.1} t/s", 512.0 / t.elapsed().as_secs_f64());
}
