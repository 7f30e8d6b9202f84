{# Functions of one number: the same operations as the CPU's (crates/quant/src/math.rs), not the driver's. -#}

{% macro exponential() %}
fn exp_of(value: f32) -> f32 {
    let v = clamp(value, -104.0, 89.0);
    // The whole number is taken from the bits: a driver may simplify what adds a number and takes it away again.
    let shifted = fma(v, 1.44269504, 12582912.0);
    let whole = bitcast<i32>(bitcast<u32>(shifted) - 0x4b400000u);
    let n = f32(whole);
    let r = fma(n, 1.9046543e-9, fma(n, -0.693147181, v));
    var q = fma(1.9875691e-4, r, 1.3981999e-3);
    q = fma(q, r, 8.333452e-3);
    q = fma(q, r, 4.1665796e-2);
    q = fma(q, r, 1.6666665e-1);
    q = fma(q, r, 5e-1);
    q = fma(q, r * r, r) + 1.0;
    let part = whole >> 1u;
    return q * bitcast<f32>(u32(part + 127) << 23u) * bitcast<f32>(u32(whole - part + 127) << 23u);
}

fn sigmoid(v: f32) -> f32 {
    return 1.0 / (1.0 + exp_of(-v));
}

fn silu(v: f32) -> f32 {
    return v / (1.0 + exp_of(-v));
}
{% endmacro %}

{% macro softplus() %}
// ln(v), v > 0 and normal: Cephes `logf`.
fn ln_of(v: f32) -> f32 {
    let bits = bitcast<u32>(v);
    var e = i32(bits >> 23u) - 126;
    var m = bitcast<f32>((bits & 0x007fffffu) | 0x3f000000u);
    if m < 0.707106781 {
        e -= 1;
        m += m;
    }
    let f = m - 1.0;
    let z = f * f;
    var q = fma(7.0376836292e-2, f, -1.1514610310e-1);
    q = fma(q, f, 1.1676998740e-1);
    q = fma(q, f, -1.2420140846e-1);
    q = fma(q, f, 1.4249322787e-1);
    q = fma(q, f, -1.6668057665e-1);
    q = fma(q, f, 2.0000714765e-1);
    q = fma(q, f, -2.4999993993e-1);
    q = fma(q, f, 3.3333331174e-1);
    let n = f32(e);
    let low = fma(n, -2.12194440e-4, fma(q, f * z, -0.5 * z));
    return fma(n, 0.693359375, f + low);
}

// ln(1 + e^v).
fn softplus(v: f32) -> f32 {
    if v > 20.0 {
        return v;
    }
    let u = exp_of(v);
    if v < -20.0 {
        return u;
    }
    // What 1 + u loses of u is put back (Kahan), below 2, where it matters; by the bits, as above.
    let w = 1.0 + u;
    if w == 1.0 {
        return u;
    }
    if w >= 2.0 {
        return ln_of(w);
    }
    return ln_of(w) * (u / (f32(bitcast<u32>(w) & 0x007fffffu) * 1.1920929e-7));
}
{% endmacro %}

{# Whether a number is infinite or none: by its bits, because a driver may assume that there are no such. -#}
{% macro finite() %}
fn is_finite(v: f32) -> bool {
    return (bitcast<u32>(v) & 0x7f800000u) != 0x7f800000u;
}
{% endmacro %}
