// The same words for numbers as the filters in app/web/templates.py. A test compares the two.

const NOTHING = "–";
const unknown = (value) => value === null || value === undefined || Number.isNaN(value);
const grouped = (text) => text.replace(/^(-?\d+)/, (whole) => whole.replace(/\B(?=(\d{3})+(?!\d))/g, ","));

const parts = new Intl.NumberFormat(document.documentElement.lang || "en").formatToParts(12345.6);
const [group, decimal] = ["group", "decimal"].map((type) => parts.find((part) => part.type === type).value);

/** A number as English writes it, with the separators of the page's language. */
export const localized = (text) => text.replace(/[,.]/g, (sign) => (sign === "," ? group : decimal));

/** 1360000000 → "1.36 GB", 8000000000 → "8 GB" */
export function bytes(value) {
  if (unknown(value)) return NOTHING;
  const units = ["B", "kB", "MB", "GB", "TB"];
  let size = value, at = 0;
  while (Math.abs(size) >= 999.5 && at < units.length - 1) { size /= 1000; at += 1; }
  const digits = at === 0 || Math.abs(size) >= 100 ? 0 : Math.abs(size) >= 10 ? 1 : 2;
  return localized(`${size.toFixed(digits).replace(/\.0+$/, "")} ${units[at]}`);
}

/** 130 → "2 min 10 s" */
export function seconds(value) {
  if (unknown(value)) return NOTHING;
  if (value < 1) return value === 0 ? "0 s" : `${(value * 1000).toFixed(0)} ms`;
  if (value < 10) return localized(`${value.toFixed(1)} s`);
  const whole = Math.round(value);
  let parts = [[Math.floor(whole / 86400), "d"], [Math.floor(whole / 3600) % 24, "h"], [Math.floor(whole / 60) % 60, "min"], [whole % 60, "s"]];
  while (parts[0][0] === 0) parts = parts.slice(1);
  return parts.slice(0, 2).filter(([count]) => count).map(([count, unit]) => `${count} ${unit}`).join(" ");
}

/** 1204 → "1,204", 1.0834 → "1.08", 0.00002 → "0.00002" */
export function number(value, digits) {
  if (unknown(value)) return NOTHING;
  if (digits === undefined || digits === null) {
    if (Number.isInteger(value) || Math.abs(value) >= 1000) digits = 0;
    else if (value && Math.abs(value) < 0.01) return small(value);
    else digits = 2;
  }
  return localized(grouped(value.toFixed(digits)));
}

function small(value) {
  const [mantissa, exponent] = value.toExponential(2).split("e");
  if (Math.abs(value) >= 1e-6) return localized(value.toFixed(2 - Number(exponent)).replace(/0+$/, ""));
  const power = Math.abs(Number(exponent)).toString().padStart(2, "0");
  return localized(`${Number(mantissa)}e-${power}`);
}

/** A share, 0.018 → "1.8%" */
export function percent(value, digits = 1) {
  if (unknown(value)) return NOTHING;
  const least = 10 ** -digits;
  const small = value !== 0 && Math.abs(value) * 100 < least / 2;
  return localized(small ? `${value < 0 ? "−" : ""}<${least.toFixed(digits)}%` : `${(value * 100).toFixed(digits)}%`);
}
