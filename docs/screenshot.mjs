// Takes a picture of the service's /docs page, which serves Swagger UI from a CDN; here its files come from npm instead.
//
//   npm install --prefix /tmp/shot @sparticuz/chromium puppeteer-core swagger-ui-dist@5
//   NODE_PATH=/tmp/shot/node_modules node docs/screenshot.mjs http://127.0.0.1:8000/docs docs/pictures/api.png
import fs from 'node:fs';
import path from 'node:path';
import { createRequire } from 'node:module';

const require = createRequire(path.join(process.env.NODE_PATH ?? '.', 'nothing.js'));
const chromium = require('@sparticuz/chromium').default ?? require('@sparticuz/chromium');
const puppeteer = require('puppeteer-core').default ?? require('puppeteer-core');
const swagger = path.dirname(require.resolve('swagger-ui-dist/package.json'));
const [url, file] = process.argv.slice(2);

const browser = await puppeteer.launch({
  args: [...chromium.args, '--no-sandbox'], executablePath: await chromium.executablePath(), headless: 'shell',
});
try {
  const page = await browser.newPage();
  await page.setViewport({ width: 1100, height: 1480, deviceScaleFactor: 0.8 });
  await page.setRequestInterception(true);
  page.on('request', (request) => {
    const asked = new URL(request.url());
    if (asked.origin === new URL(url).origin || asked.protocol === 'data:') return request.continue();
    const local = path.join(swagger, path.basename(asked.pathname));
    if (!asked.pathname.includes('swagger-ui-dist') || !fs.existsSync(local)) return request.abort();
    const contentType = local.endsWith('.css') ? 'text/css' : 'text/javascript';
    return request.respond({ status: 200, contentType, body: fs.readFileSync(local) });
  });
  await page.goto(url, { waitUntil: 'networkidle0', timeout: 120000 });
  await page.click('#operations-default-transcribe_v1_audio_transcriptions_post .opblock-summary-control').catch(() => {});
  await new Promise((done) => setTimeout(done, 1500));
  await page.screenshot({ path: file });
} finally {
  await browser.close();
}
