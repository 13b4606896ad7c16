"""The JavaScript every coloured component shares: the theme's colour ramps and readable text on them."""

from __future__ import annotations

BYTES_JS = """
const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
"""
PALETTE_JS = (
    BYTES_JS
    + """
const ramp = (el, diverging) => {
  const name = diverging ? "--st-chart-diverging-colors" : "--st-chart-sequential-colors";
  const stops = getComputedStyle(el).getPropertyValue(name).split(",").map((s) => s.trim())
    .filter((s) => /^#[0-9a-f]{6}$/i.test(s));
  return stops.length > 2 ? stops : ["#f2f5ff", "#7b94f1", "#1c2f78"];
};
const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
const lut = (stops) => {
  const out = new Uint8ClampedArray(256 * 4), n = stops.length - 1;
  for (let i = 0; i < 256; i++) {
    const p = (i / 255) * n, k = Math.min(n - 1, Math.floor(p)), a = rgb(stops[k]), b = rgb(stops[k + 1]);
    for (let c = 0; c < 3; c++) out[i * 4 + c] = a[c] + (b[c] - a[c]) * (p - k);
    out[i * 4 + 3] = 255;
  }
  return out;
};
const luminance = (c) => [0.2126, 0.7152, 0.0722].reduce((sum, w, i) => {
  const v = c[i] / 255;
  return sum + w * (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
}, 0);
const ink = (c) => (luminance(c) > 0.179 ? "#000000" : "#ffffff");
"""
)
