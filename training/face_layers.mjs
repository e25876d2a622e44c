// Prints the artwork of parts of @dicebear/pixel-art as a JSON list of SVG elements, one for each part that is asked for.
// In: a JSON list of {"group", "variant", "colors"} on stdin. Needs `npm install @dicebear/core@9.4.3 @dicebear/pixel-art@9.4.3`
// in the folder named as the argument.
import { readFileSync } from 'node:fs';
import { resolve } from 'node:path';
import { pathToFileURL } from 'node:url';

const library = resolve(process.argv[2], 'node_modules/@dicebear/pixel-art/lib');
const { create } = await import(pathToFileURL(`${library}/index.js`));
const components = await import(pathToFileURL(`${library}/components/index.js`));

// The head is no component: it is what an avatar of no parts and one skin colour has.
const none = { pick: (values, other) => values?.[0] ?? other, bool: () => false };
const head = (colors) => create({ prng: none, options: { skinColor: [colors.skin.slice(1)] } }).body;

const parts = JSON.parse(readFileSync(0, 'utf8'));
const drawn = parts.map(({ group, variant, colors }) =>
  group === 'head' ? head(colors) : components[group][variant]({}, colors),
);
process.stdout.write(JSON.stringify(drawn));
